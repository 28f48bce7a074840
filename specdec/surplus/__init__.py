"""What the target's hidden state knows beyond the next token, in nats, and how that predicts acceptance."""

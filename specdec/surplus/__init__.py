"""What the target's hidden state knows beyond the next token, in nats, and how that predicts acceptance.

The information surplus is that of "A Markov Categorical Framework for Language Modeling" (arXiv 2507.19247, theorems
as its second version numbers them). The paper measures nothing and does not speak of acceptance: estimators,
controls and the claims that tie the two are this package's own, and the README says which of them failed.
"""

"""Train draft heads: data, responses, features, unroll, losses, trainer. Knows nothing of serving."""

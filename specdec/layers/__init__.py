"""Building blocks that the lean target and the draft head share: projections, norm, rotary positions."""

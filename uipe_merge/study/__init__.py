"""Choosing α: how much a model forgot, what it cost, and the search between the two."""

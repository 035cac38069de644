"""Training on a GPU elsewhere, rented for it or one's own: from a dataset at home to a model at home."""

"""Training: the dataset folder, its windows, the loop. Keras is imported where a network is built, not here."""

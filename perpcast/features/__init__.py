"""What the model sees: indicators, their form as model input, and the scaler. The same code in batch and live."""

"""What `scldm evaluate` and the gate after training do: generated cells, an autoencoder, an embedding."""

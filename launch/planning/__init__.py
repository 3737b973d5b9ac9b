"""What `scldm plan` says: the machine and the training, what they take, and other layouts of the same."""

"""From labels and tables to what the networks are asked."""

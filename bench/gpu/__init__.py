"""What a GPU is asked once there is one, and what its compiler says before."""

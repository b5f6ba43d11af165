"""What happens beside the loss while a trainer trains: guards, metrics, checkpoints. One file each."""

"""What people run: each recipe is a module with `main(argv=None)`."""

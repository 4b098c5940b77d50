"""What training minimises: one file a method, pure losses first, then the objective."""

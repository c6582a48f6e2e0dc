"""LIBERO's scenes with a policy in them: demonstrations of a scripted expert, training, success rates."""

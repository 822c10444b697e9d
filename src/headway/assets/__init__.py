"""The small models that this project trained itself, each with its card."""

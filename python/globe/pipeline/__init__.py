"""The jobs that a user asks for."""

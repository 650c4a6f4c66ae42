"""What of this machine the process may use, and how its threads wait."""

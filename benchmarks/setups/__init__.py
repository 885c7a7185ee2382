"""Which training setups work."""

"""What runs on Ray: the ledger, the supervisor, and an owner for each awake session."""

"""What is charged, to the nano: callers' transcripts, providers' books and the gateway's ledger tell the same story."""

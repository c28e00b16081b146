"""What does the operator want? `gateway.yaml` read, checked and turned into types."""

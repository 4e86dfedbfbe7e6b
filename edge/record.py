"""What the line writes into its journal, when it has one."""

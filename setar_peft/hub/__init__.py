"""What an adapter looks like on the Hub: its model card."""

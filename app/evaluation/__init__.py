"""`sluice evaluate`: measures variants, writes their cards, and the page that compares them."""

"""What commands and errors say last: the commands that come next."""

"""What a bundle can be lowered to or compiled into, one engine a module."""

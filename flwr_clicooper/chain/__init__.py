"""Who talks to whom: the relay, the owner, the trainers, and their messages."""

"""Server processes: who gets one, who has to go, one life of each."""

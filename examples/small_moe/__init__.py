"""How the small model that ships with the runner was made: texts of Debian packages, training, measured figures."""

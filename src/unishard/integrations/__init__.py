"""Other libraries' training loops on unishard's engine; each module needs its library, and imports it when used."""

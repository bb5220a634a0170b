"""How stored bytes become numbers and back; numpy only, and ignorant of which tensor it is."""

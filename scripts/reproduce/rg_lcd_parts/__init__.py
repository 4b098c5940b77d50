"""What `rg_lcd.py` is made of."""

"""What can only be known where the ranks run, found before weights are loaded: do they agree, see, reach each other?"""

"""Write the golden scenes anew."""

from tests.golden import write

write()

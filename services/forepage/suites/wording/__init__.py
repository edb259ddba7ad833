"""What the suites say: words, filler, needles, facts and questions of each split. Tables; nothing is computed here."""

from iessp.cli import main

main()

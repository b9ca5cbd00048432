"""What the programs of the four papers share, a concept to a file.

data            images and labels
networks        classifiers
gan_networks    generators and discriminators
classify        training a classifier
adversarial     training a generator against a discriminator
scores          Inception score and FID by a classifier that is trained here
program         the command line: which runs there are, those that are left, plots
records         results as JSON lines
statistics      means, standard errors, intervals, verdicts
figures         bars, curves
"""

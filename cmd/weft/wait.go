package main

// runWait is "weft wait".
func runWait(e *env, args []string) error {
	flags := newFlags(e, "wait", "", `Does nothing until SIGTERM or SIGINT. It is for the main container of a DaemonSet's pods
whose init containers do the work: the image has no shell, and no sleep.`)
	if _, err := parseFlags(flags, args); err != nil {
		return err
	}
	<-e.ctx.Done()
	return nil
}

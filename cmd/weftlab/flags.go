//go:build linux

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// flagSet is the flags of a command and its help.
type flagSet struct {
	*flag.FlagSet
	help func()
}

// newFlags makes the flags of a command. usage is what follows the command's
// name, about is a paragraph.
func newFlags(e *env, name, usage, about string) flagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	// Package flag would print the help after each mistake.
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	return flagSet{fs, func() {
		fmt.Fprintf(e.stdout, "Usage: weftlab %s\n\n%s\n", strings.TrimSpace(name+" "+usage), about)
		head := "\nFlags:\n"
		fs.VisitAll(func(f *flag.Flag) {
			value, text := flag.UnquoteUsage(f)
			if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" {
				text += fmt.Sprintf(" (default %s)", f.DefValue)
			}
			line := strings.TrimRight(fmt.Sprintf("  --%s %s", f.Name, strings.ToUpper(value)), " ")
			fmt.Fprintf(e.stdout, "%s%s\n        %s\n", head, line, text)
			head = ""
		})
	}}
}

// parseFlags parses flags and returns what follows them, at most a number of
// words (any number if that is negative).
func parseFlags(fs flagSet, args []string, most int) ([]string, error) {
	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fs.help()
		return nil, err
	case err != nil:
		return nil, usagef(`%s: %v; "weftlab %s -h" lists the flags`, fs.Name(), err, fs.Name())
	case most >= 0 && fs.NArg() > most:
		return nil, usagef(`%s: there is no use for %q; "weftlab %s -h" shows how to call it`, fs.Name(), fs.Arg(most), fs.Name())
	}
	return fs.Args(), nil
}

// defaultName is the lab's name where none is given.
const defaultName = "weft"

// weftFlag adds the flag that says where the weft program is.
func weftFlag(fs flagSet) *string {
	return fs.String("weft", "", "`path` of the weft program; by default the one beside weftlab, else the one in PATH")
}

// findWeft finds the weft program.
func findWeft(path string) (string, error) {
	if path == "" {
		path = "weft"
		if self, err := os.Executable(); err == nil {
			beside := filepath.Join(filepath.Dir(self), "weft")
			if _, err := os.Stat(beside); err == nil {
				path = beside
			}
		}
	}
	found, err := lookPath(path)
	if err != nil {
		return "", fmt.Errorf("the weft program is missing (%w); `make build` makes it, and --weft says where it is", err)
	}
	return found, nil
}

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"regexp"
	"strings"
)

// places are the directories every command agrees on.
type places struct {
	PinDir   string
	RunDir   string
	StateDir string
}

const defaultStateDir = "/var/lib/weft"

// register adds the flags that say where things are.
func (p *places) register(fs *flag.FlagSet) {
	fs.StringVar(&p.PinDir, "pin-dir", "/sys/fs/bpf/weft", "`directory` on a BPF filesystem where programs and maps are pinned")
	fs.StringVar(&p.RunDir, "run-dir", "/run/weft", "`directory` where the agent says that and what it runs")
	fs.StringVar(&p.StateDir, "state-dir", defaultStateDir, "`directory` that keeps what outlives a reboot")
}

// faults lists what is wrong with p.
func (p *places) faults() []string {
	var faults []string
	for _, dir := range []struct{ flag, value string }{
		{"--pin-dir", p.PinDir}, {"--run-dir", p.RunDir}, {"--state-dir", p.StateDir},
	} {
		if !strings.HasPrefix(dir.value, "/") {
			faults = append(faults, fmt.Sprintf("%s is %q; give an absolute path", dir.flag, dir.value))
		}
	}
	return faults
}

// flagSet is the flags of a command and its help.
type flagSet struct {
	*flag.FlagSet
	help func()
}

// newFlags makes the flags of a command. usage is what follows the command's
// name, about is a paragraph.
func newFlags(e *env, name, usage, about string) flagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	// Package flag would print the whole help after each mistake.
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	return flagSet{fs, func() {
		fmt.Fprintf(e.stdout, "Usage: weft %s\n\n%s\n", strings.TrimSpace(name+" "+usage), about)
		printFlags(e.stdout, fs)
	}}
}

// printFlags lists the flags with two dashes, which package flag accepts as
// well as one.
func printFlags(w io.Writer, fs *flag.FlagSet) {
	title := "\nFlags:\n"
	fs.VisitAll(func(f *flag.Flag) {
		fmt.Fprint(w, title)
		title = ""
		value, text := flag.UnquoteUsage(f)
		head := "--" + f.Name
		if len(f.Name) == 1 {
			head = "-" + f.Name
		}
		if value != "" {
			head += " " + strings.ToUpper(value)
		}
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" {
			text += fmt.Sprintf(" (default %s)", f.DefValue)
		}
		fmt.Fprintf(w, "  %s\n        %s\n", head, text)
	})
}

// undefinedFlag finds the flag in package flag's error about it.
var undefinedFlag = regexp.MustCompile(`^flag provided but not defined: -+(.*)$`)

// parseFlags parses flags and returns the arguments between and after them, of
// which there may be at most as many as are named.
func parseFlags(fs flagSet, args []string, named ...string) ([]string, error) {
	var rest []string
	for {
		if err := fs.Parse(args); err != nil {
			return nil, flagError(fs, err)
		}
		if fs.NArg() == 0 {
			break
		}
		parsed := len(args) - fs.NArg()
		if parsed > 0 && args[parsed-1] == "--" {
			rest = append(rest, fs.Args()...)
			break
		}
		rest, args = append(rest, fs.Arg(0)), fs.Args()[1:]
	}
	if len(rest) > len(named) {
		extra := rest[len(named)]
		return nil, usagef("%s: there is no use for %q; \"weft %s -h\" shows how to call it", fs.Name(), extra, fs.Name())
	}
	return rest, nil
}

// flagError turns an error of package flag into a sentence.
func flagError(fs flagSet, err error) error {
	if errors.Is(err, flag.ErrHelp) {
		fs.help()
		return err
	}
	text := err.Error()
	if m := undefinedFlag.FindStringSubmatch(text); m != nil {
		text = fmt.Sprintf("there is no flag --%s", m[1])
	}
	return usagef("%s: %s; \"weft %s -h\" lists the flags", fs.Name(), text, fs.Name())
}

// oneOf completes the sentence about a flag that takes one of a few words.
func oneOf(name, value string, words ...string) string {
	for _, w := range words {
		if w == value {
			return ""
		}
	}
	last := len(words) - 1
	return fmt.Sprintf("%s is %q; give %s or %s", name, value, strings.Join(words[:last], ", "), words[last])
}

// usageFaults makes one error of what is wrong with a command line.
func usageFaults(command string, faults []string) error {
	var list []string
	for _, f := range faults {
		if f != "" {
			list = append(list, f)
		}
	}
	switch len(list) {
	case 0:
		return nil
	case 1:
		return usagef("%s: %s", command, list[0])
	}
	return usagef("%s:\n  %s", command, strings.Join(list, "\n  "))
}

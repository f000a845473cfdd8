//go:build linux

package hostrules

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// flavour is one of the two kinds of iptables.
type flavour string

const (
	nft    flavour = "nft"
	legacy flavour = "legacy"
)

var flavours = []flavour{nft, legacy}

// ErrNoProgram says that iptables, or a part of it, is not installed.
var ErrNoProgram = errors.New("install the package iptables, " +
	`or set "EnableNFTables": true in net-conf.json, which needs no program, ` +
	"or do without these rules (--ip-masq=false --iptables-forward-rules=false)")

// ErrLocked says that somebody else has held the lock of iptables all the time
// that we were ready to wait.
var ErrLocked = errors.New("another program holds the lock of iptables (/run/xtables.lock); see who: fuser -v /run/xtables.lock")

// lockWait is how many seconds to wait for the lock, which iptables-legacy takes
// even to list. The next Sync tries again. Tests don't wait as long.
var lockWait = "5"

const (
	// programTimeout bounds a run: far beyond what a large table takes.
	programTimeout = 30 * time.Second
	// resourceProblem is how the programs exit without the lock.
	resourceProblem = 4
)

// programs are those of iptables. It remembers of which flavour each is, by its
// path.
type programs map[string]flavour

// find finds a program of a flavour: under its full name, else under the short
// one when that is of this flavour.
func (p programs) find(ctx context.Context, f *family, suffix string, want flavour) (string, error) {
	if path, err := exec.LookPath(f.program + "-" + string(want) + suffix); err == nil {
		return path, nil
	}
	path, err := exec.LookPath(f.program + suffix)
	if err == nil {
		is, err := p.flavourOf(ctx, path)
		if err != nil {
			return "", err
		}
		if is == want {
			return path, nil
		}
	}
	return "", fmt.Errorf("there is no %s-%s%s: %w", f.program, want, suffix, ErrNoProgram)
}

// flavourOf asks a program of which flavour it is.
func (p programs) flavourOf(ctx context.Context, path string) (flavour, error) {
	if is, ok := p[path]; ok {
		return is, nil
	}
	text, err := run(ctx, "", path, "--version") // "iptables v1.8.9 (nf_tables)"
	if err != nil {
		return "", fmt.Errorf("asking for the version of iptables: %w", err)
	}
	p[path] = legacy // "(legacy)"; before 1.8, nothing
	if strings.Contains(text, "(nf_tables)") {
		p[path] = nft
	}
	return p[path], nil
}

// list lists one chain of a table.
func (p programs) list(ctx context.Context, f *family, of flavour, table, chain string) (listing, error) {
	program, err := p.find(ctx, f, "", of)
	if err != nil {
		return listing{}, err
	}
	text, err := run(ctx, "", program, "-w", lockWait, "-t", table, "-S", chain)
	if failure := (*failure)(nil); errors.As(err, &failure) && strings.Contains(failure.said, "No chain/target/match by that name") {
		return listing{}, nil
	}
	if err != nil {
		return listing{}, fmt.Errorf("listing chain %s of table %s: %w", chain, table, err)
	}
	return parseListing(text, chain), nil
}

// restore changes a table, in one transaction.
func (p programs) restore(ctx context.Context, f *family, of flavour, table string, lines []string) error {
	program, err := p.find(ctx, f, "-restore", of)
	if err != nil {
		return err
	}
	text := "*" + table + "\n" + strings.Join(lines, "\n") + "\nCOMMIT\n"
	if _, err := run(ctx, text, program, "--noflush", "-w", lockWait); err != nil {
		return fmt.Errorf("changing table %s:\n%s%w", table, text, err)
	}
	return nil
}

// failure is a program that did not do what it should.
type failure struct {
	command string
	code    int
	said    string
}

// Error gives the command and what it said.
func (f *failure) Error() string {
	return fmt.Sprintf("%s: exit status %d: %s", f.command, f.code, f.said)
}

// run runs a program in the calling thread's network namespace, and returns what
// it prints.
func run(ctx context.Context, input, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, programTimeout, fmt.Errorf("no end after %v", programTimeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdin = strings.NewReader(input)
	cmd.WaitDelay = time.Second // for who keeps our pipes open
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	command := strings.Join(cmd.Args, " ")
	if ctx.Err() != nil {
		return "", fmt.Errorf("%s: %w", command, context.Cause(ctx))
	}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		said := strings.TrimSpace(stderr.String())
		err = &failure{command, exit.ExitCode(), said}
		if exit.ExitCode() == resourceProblem && strings.Contains(said, "lock") {
			err = fmt.Errorf("%w: %w", ErrLocked, err)
		}
		return "", err
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", command, err)
	}
	return stdout.String(), nil
}

//go:build linux

package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a program that runs in the background of a space. It is cut off
// from the terminal (setsid), so that Ctrl-C leaves it to its lab, and Close
// ends it at the latest.
type Process struct {
	what string
	pid  pid
	log  string
	done chan struct{}
	err  error // set before done is closed
}

// Start starts a command in the background. What it prints goes to a file in
// the lab's directory.
func (s *Space) Start(command ...string) (*Process, error) { return s.startWith(nil, command...) }

// startWith is Start with more in the environment.
func (s *Space) startWith(environment []string, command ...string) (*Process, error) {
	command = words(command)
	cmd := s.Command(context.Background(), command...)
	cmd.Env = append(cmd.Env, environment...)
	return s.lab.start(cmd, s.name+" "+filepath.Base(command[0]))
}

var processes atomic.Int64

// start starts a prepared command and notes it in the record.
func (l *Lab) start(cmd *exec.Cmd, what string) (*Process, error) {
	slug := strings.NewReplacer("/", "-", " ", "-").Replace(what)
	log, err := os.Create(filepath.Join(l.Directory(), fmt.Sprintf("%s-%d.log", slug, processes.Add(1))))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid = true
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", what, err)
	}
	p := &Process{what: what, log: log.Name(), done: make(chan struct{})}
	p.pid, err = pidOf(cmd.Process.Pid)
	if err == nil {
		err = writePID(l.record.pidDirectory(), p.pid, what)
	}
	go func() {
		p.err = cmd.Wait()
		os.Remove(filepath.Join(l.record.pidDirectory(), fmt.Sprint(p.pid.ID)))
		close(p.done)
	}()
	if err != nil {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL) // nobody could find it later
		return nil, fmt.Errorf("starting %s: %w", what, err)
	}
	return p, nil
}

// PID is the process's number.
func (p *Process) PID() int { return p.pid.ID }

// Output is what the process has printed so far, stdout and stderr.
func (p *Process) Output() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Running reports whether the process has not ended.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Wait waits until the process has ended and returns an error that shows what
// it printed when it failed.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
	case <-ctx.Done():
		return fmt.Errorf("waiting for %s: %w", p.what, context.Cause(ctx))
	}
	if p.err != nil {
		return fmt.Errorf("%s: %w\n%s", p.what, p.err, p.Output())
	}
	return nil
}

// outputTimeout is how long a process may take to print what is waited for.
const outputTimeout = 20 * time.Second

// WaitOutput waits until the process has printed a text.
func (p *Process) WaitOutput(ctx context.Context, text string) error {
	ctx, cancel := context.WithTimeout(ctx, Patient(outputTimeout))
	defer cancel()
	for {
		running := p.Running()
		if strings.Contains(p.Output(), text) {
			return nil
		}
		if !running {
			return fmt.Errorf("%s ended before it printed %q:\n%s", p.what, text, p.Output())
		}
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return fmt.Errorf("waiting for %s to print %q: %w\n%s", p.what, text, err, p.Output())
		}
	}
}

// Stop sends a signal and waits until the process is gone. One that does not
// go within ten seconds is killed, and that is an error.
func (p *Process) Stop(sig syscall.Signal) error {
	if err := p.pid.signal(sig); err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(10 * time.Second):
	}
	err := p.pid.signal(unix.SIGKILL)
	<-p.done
	if err != nil {
		return err
	}
	return fmt.Errorf("%s did not end within ten seconds of %s:\n%s", p.what, sig, p.Output())
}

// sleep waits for a while, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

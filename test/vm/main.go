//go:build linux && amd64

// Vm runs a command on another kernel: it boots one of Debian's cloud kernels
// in an emulator, with this machine's files in it, and exits with the
// command's status.
//
//	vm -kernel 6.1 uname -r
//	vm -kernel 6.12 -timeout 5m bin/interop/kernel.test -test.v
//
// The command sees the whole root file system of this machine at its usual
// place. It is mounted read-only with a RAM disk laid over it, so the command
// may write what it likes and nothing of it survives. The working directory
// and the variables named WEFT_* are carried over.
//
// Exit status 125 means that the machine failed, not the command: it did not
// boot, ran out of time, or its kernel complained about itself (an oops, a
// warning with a trace, a device that is never released).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// machineFailed is the exit status when there is no status of the command.
const machineFailed = 125

func main() {
	if os.Getpid() == 1 {
		guest() // this binary is also the machine's init; it does not return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	status, err := run(ctx, os.Args[1:])
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "vm:", err)
	}
	os.Exit(status)
}

// job is what the machine is to do; it travels in its initial RAM disk.
type job struct {
	Command []string
	Dir     string
	Env     []string
	Modules []string // to load before the command, beyond what loads by itself
	Kernel  string   // directory of the kernel's files, on the shared root
}

// modules are loaded at the start: what a node has and no packet, device or
// rule pulls in by itself. Everything else the kernel loads when asked for it,
// as on any machine.
const modules = "br_netfilter,nf_conntrack,nf_nat"

func run(ctx context.Context, args []string) (int, error) {
	flags := flag.NewFlagSet("vm", flag.ContinueOnError)
	var (
		series  = flags.String("kernel", "6.1", "kernel `series`: 6.1, 6.12; the newest of it that apt knows")
		timeout = flags.Duration("timeout", 5*time.Minute, "boot and command together may take this long")
		extra   = flags.String("modules", modules, "kernel modules to load first, separated by commas")
		m       machine
	)
	flags.StringVar(&m.memory, "memory", "1G", "memory of the machine; what the command writes lives in it too")
	flags.IntVar(&m.cpus, "cpus", 1, "processors of the machine")
	flags.IntVar(&m.cards, "cards", 0, "virtio `network cards` of the machine: each two are cabled to each other; WEFT_CARDS names them to the command")
	flags.StringVar(&m.accel, "accel", "tcg", "qemu accelerator: tcg works everywhere, kvm is faster where it works")
	flags.BoolVar(&m.verbose, "console", false, "show the kernel's console even when all goes well")
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: vm [flags] command [arguments]")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0, err
		}
		return 2, err
	}
	if flags.NArg() == 0 {
		flags.Usage()
		return 2, errors.New("no command")
	}
	if os.Geteuid() != 0 {
		return machineFailed, errors.New("sharing the root file system with the machine needs root")
	}

	ctx, cancel := context.WithTimeoutCause(ctx, *timeout,
		fmt.Errorf("not finished after %v (-timeout)", *timeout))
	defer cancel()

	// A program runs ten to thirty times slower there.
	env, load := append(weftEnv(), "WEFT_PATIENCE=20"), *extra
	if m.cards > 0 {
		env, load = append(env, "WEFT_CARDS="+m.cardNames()), load+",virtio_net"
	}
	k, err := findKernel(ctx, *series)
	if err != nil {
		return machineFailed, err
	}
	dir, err := os.Getwd()
	if err != nil {
		return machineFailed, err
	}
	initrd, err := k.initrd(ctx, job{
		Command: flags.Args(),
		Dir:     dir,
		Env:     env,
		Modules: strings.FieldsFunc(load, func(r rune) bool { return r == ',' }),
		Kernel:  k.dir,
	})
	if err != nil {
		return machineFailed, fmt.Errorf("making the initial RAM disk: %w", err)
	}
	return m.boot(ctx, filepath.Join(k.dir, "vmlinux"), initrd)
}

// weftEnv are the variables that steer weft's tests.
func weftEnv() []string {
	var env []string
	for _, kv := range os.Environ() {
		if strings.HasPrefix(kv, "WEFT_") {
			env = append(env, kv)
		}
	}
	return env
}

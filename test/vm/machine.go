//go:build linux && amd64

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// machine is an emulated computer. Its three serial lines are the kernel's
// console, the command's output and the command's exit status.
type machine struct {
	accel   string
	memory  string
	cpus    int
	cards   int // network cards, each two of them cabled to each other
	verbose bool
}

// shareTag names the shared root between the two sides.
const shareTag = "hostroot"

// boot runs the machine until it switches itself off, and returns the status
// that its command ended with.
func (m *machine) boot(ctx context.Context, vmlinux string, initrd []byte) (int, error) {
	work, err := os.MkdirTemp("", "weft-vm-")
	if err != nil {
		return machineFailed, err
	}
	defer os.RemoveAll(work)
	var (
		initrdFile  = filepath.Join(work, "initrd")
		consoleFile = filepath.Join(work, "console")
		statusFile  = filepath.Join(work, "status")
		socket      = filepath.Join(work, "root.sock")
	)
	if err := os.WriteFile(initrdFile, initrd, 0o600); err != nil {
		return machineFailed, err
	}
	stopSharing, err := shareRoot(ctx, socket, filepath.Join(work, "virtiofsd.log"))
	if err != nil {
		return machineFailed, fmt.Errorf("sharing the root file system: %w", err)
	}
	defer stopSharing()

	qemu := exec.CommandContext(ctx, "qemu-system-x86_64", append(m.cardArguments(),
		"-accel", m.accel, "-cpu", "max", "-smp", strconv.Itoa(m.cpus), "-m", m.memory,
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", vmlinux, "-initrd", initrdFile,
		// Level 5 lets warnings through, and complaints reads them; panic=-1
		// restarts at once, which -no-reboot turns into the end.
		"-append", "console=ttyS0 loglevel=5 panic=-1",
		"-serial", "file:"+consoleFile, "-serial", "stdio", "-serial", "file:"+statusFile,
		"-object", "memory-backend-memfd,id=memory,share=on,size="+m.memory, "-numa", "node,memdev=memory",
		"-chardev", "socket,id=root,path="+socket,
		"-device", "vhost-user-fs-pci,chardev=root,tag="+shareTag,
	)...)
	qemu.Stdout, qemu.Stderr = os.Stdout, os.Stderr
	qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runErr := qemu.Run()

	console, _ := os.ReadFile(consoleFile)
	console = bytes.ReplaceAll(console, []byte("\r"), nil)
	status, err := verdict(ctx, runErr, statusFile, console)
	if err != nil || m.verbose {
		fmt.Fprintf(os.Stderr, "--- console of the machine\n%s---\n", console)
	}
	return status, err
}

// cardArguments give the machine its cards.
func (m *machine) cardArguments() (all []string) {
	for i := range m.cards {
		all = append(all,
			"-netdev", fmt.Sprintf("hubport,id=card%d,hubid=%d", i, i/2),
			"-device", fmt.Sprintf("virtio-net-pci,netdev=card%d,romfile=", i))
	}
	return all
}

// cardNames are those that the kernel gives to cards, separated by commas.
func (m *machine) cardNames() string {
	var names []string
	for i := range m.cards {
		names = append(names, fmt.Sprint("eth", i))
	}
	return strings.Join(names, ",")
}

// verdict finds out how the command ended, or why nobody knows.
func verdict(ctx context.Context, runErr error, statusFile string, console []byte) (int, error) {
	if ctx.Err() != nil {
		return machineFailed, context.Cause(ctx)
	}
	if runErr != nil {
		return machineFailed, fmt.Errorf("qemu: %w", runErr)
	}
	text, _ := os.ReadFile(statusFile)
	status, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return machineFailed, errors.New("the machine stopped before its command ended")
	}
	if line := complaint(console); line != "" && status == 0 {
		return machineFailed, fmt.Errorf("the command succeeded, but the kernel complained: %s", line)
	}
	return status, nil
}

// complaints are the marks of a kernel that found a defect in itself, or was
// driven into one. Stalls are not among them: an emulated processor that has
// to wait for a real one looks stalled.
var complaints = regexp.MustCompile(
	`(?m)^.*(Oops|Kernel panic|general protection|kernel BUG|BUG: (?:kernel|unable|KASAN|sleeping|scheduling)|` +
		`WARNING: CPU|unregister_netdevice: waiting|refcount_t:|suspicious RCU).*$`)

func complaint(console []byte) string {
	return string(bytes.TrimSpace(complaints.Find(console)))
}

// shareRoot offers this machine's root file system on a socket, until the
// returned function is called.
func shareRoot(ctx context.Context, socket, logFile string) (stop func(), err error) {
	const daemon = "/usr/lib/qemu/virtiofsd" // Debian 12: qemu-system-common
	log, err := os.Create(logFile)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, daemon, "--socket-path="+socket,
		"-o", "source=/", "-o", "sandbox=chroot", "-o", "cache=always")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	stop = func() { _ = cmd.Process.Kill(); <-ended }

	for tick := time.Tick(20 * time.Millisecond); ; {
		if _, err := os.Stat(socket); err == nil {
			return stop, nil
		}
		select {
		case <-tick:
		case <-ended:
			text, _ := os.ReadFile(logFile)
			return nil, fmt.Errorf("%s ended: %s", daemon, text)
		case <-ctx.Done():
			stop()
			return nil, context.Cause(ctx)
		}
	}
}

//go:build linux && amd64

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// guest is the init of the machine: it makes the shared root its own, runs
// the job and switches the machine off.
func guest() {
	status := machineFailed
	var j job
	for _, step := range []struct {
		doing string
		do    func() error
	}{
		{"mounting /dev, /proc and /sys", mountKernelFilesystems},
		{"reading the job", func() error { return readJob(&j) }},
		{"loading the first modules", loadFirstModules},
		{"mounting the shared root", mountRoot},
		{"making the kernel's modules known", func() error { return mountModules(j.Kernel) }},
		{"entering the shared root", enterRoot},
		{"mounting inside the shared root", mountInside},
		{"loading modules", func() error { return modprobe(j.Modules) }},
		{"setting lo up", func() error { return exec.Command("ip", "link", "set", "lo", "up").Run() }},
		{"running the command", func() error {
			var err error
			status, err = j.run()
			return err
		}},
		{"reporting the status", func() error { return report(status) }},
	} {
		if err := step.do(); err != nil {
			// The console is this process's stderr; no status is reported,
			// so the other side knows that the machine failed.
			fmt.Fprintf(os.Stderr, "init: %s: %v\n", step.doing, err)
			break
		}
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	os.Exit(status) // not reached; the end of init is a panic
}

const newRoot = "/root"

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mounting %s on %s: %w", source, target, err)
	}
	return nil
}

func mountKernelFilesystems() error {
	return errors.Join(
		mount("devtmpfs", "/dev", "devtmpfs", 0, ""),
		mount("proc", "/proc", "proc", 0, ""),
		mount("sysfs", "/sys", "sysfs", 0, ""),
	)
}

func readJob(j *job) error {
	data, err := os.ReadFile(jobFile)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, j)
}

func loadFirstModules() error {
	files, err := os.ReadDir(moduleDir) // sorted by name, which is the order to load
	if err != nil {
		return err
	}
	for _, file := range files {
		data, err := os.ReadFile(filepath.Join(moduleDir, file.Name()))
		if err != nil {
			return err
		}
		if err := unix.InitModule(data, ""); err != nil {
			return fmt.Errorf("module %s: %w", file.Name(), err)
		}
	}
	return nil
}

func mountRoot() error {
	if err := mount(shareTag, "/lower", "virtiofs", unix.MS_RDONLY, ""); err != nil {
		return err
	}
	if err := mount("tmpfs", "/upper", "tmpfs", 0, ""); err != nil {
		return err
	}
	for _, dir := range []string{"/upper/changes", "/upper/work"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	return mount("overlay", newRoot, "overlay", 0, "lowerdir=/lower,upperdir=/upper/changes,workdir=/upper/work")
}

// mountModules puts the kernel's modules where modprobe looks for them, so
// that the kernel can load what it is asked for.
func mountModules(kernel string) error {
	modules := filepath.Join(newRoot, kernel, "lib", "modules")
	return mount(modules, filepath.Join(newRoot, "usr/lib/modules"), "", unix.MS_BIND, "")
}

// enterRoot makes the shared root this process's root, and with it the one of
// the kernel's own helpers: threads of the kernel share init's root.
func enterRoot() error {
	for _, dir := range []string{"/dev", "/proc", "/sys"} {
		if err := mount(dir, newRoot+dir, "", unix.MS_MOVE, ""); err != nil {
			return err
		}
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

func mountInside() error {
	return errors.Join(
		mount("tmpfs", "/run", "tmpfs", 0, ""),
		mount("tmpfs", "/dev/shm", "tmpfs", 0, ""),
		mount("devpts", "/dev/pts", "devpts", 0, ""),
		mount("bpf", "/sys/fs/bpf", "bpf", 0, ""),
		mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""),
		mount("tracefs", "/sys/kernel/tracing", "tracefs", 0, ""),
	)
}

func modprobe(names []string) error {
	if err := os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin"); err != nil {
		return err
	}
	for _, name := range names {
		if out, err := exec.Command("modprobe", name).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", name, err, out)
		}
	}
	return nil
}

// run runs the command with its output on the second serial line.
func (j *job) run() (int, error) {
	out, err := openLine("/dev/ttyS1")
	if err != nil {
		return machineFailed, err
	}
	defer out.Close()
	cmd := exec.Command(j.Command[0], j.Command[1:]...)
	cmd.Dir = j.Dir
	cmd.Env = append(os.Environ(), append([]string{"HOME=/root"}, j.Env...)...)
	cmd.Stdout, cmd.Stderr = out, out
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return shellStatus(exit.Sys().(syscall.WaitStatus)), nil
	case err != nil:
		// The command could not be started: say it as a shell would.
		fmt.Fprintln(out, "vm:", err)
		return 127, nil
	}
	return 0, nil
}

// shellStatus is the status as a shell shows it.
func shellStatus(w syscall.WaitStatus) int {
	if w.Signaled() {
		return 128 + int(w.Signal())
	}
	return w.ExitStatus()
}

func report(status int) error {
	line, err := openLine("/dev/ttyS2")
	if err != nil {
		return err
	}
	fmt.Fprintln(line, status)
	return line.Close() // waits until all is sent
}

// openLine opens a serial line that carries bytes as they are.
func openLine(name string) (*os.File, error) {
	line, err := os.OpenFile(name, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	settings, err := unix.IoctlGetTermios(int(line.Fd()), unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("settings of %s: %w", name, err)
	}
	settings.Oflag &^= unix.OPOST
	settings.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(int(line.Fd()), unix.TCSETS, settings); err != nil {
		return nil, fmt.Errorf("settings of %s: %w", name, err)
	}
	return line, nil
}

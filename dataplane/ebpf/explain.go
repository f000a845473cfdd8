//go:build linux

package ebpf

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// explain adds to a failure what is missing and what it costs. The question is
// asked after the failure: trying is the only probe that tells the truth.
//
// A missing capability is told without the kernel's and the library's words:
// these speak of verifier faults and memory limits, and mislead.
func explain(err error) error {
	if err == nil {
		return nil
	}
	var verifier *ebpf.VerifierError
	denied := errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES)
	if denied || errors.As(err, &verifier) {
		if missing := MissingCapabilities(); len(missing) > 0 {
			return fmt.Errorf("programs can't be loaded without the %s %s; add it (in Kubernetes to securityContext.capabilities.add): %w",
				plural("capability", "capabilities", missing), strings.Join(missing, ", "), unix.EPERM)
		}
	}
	switch {
	case errors.As(err, &verifier):
		return fmt.Errorf("the kernel's verifier refused a program (%w); please report this with `uname -r` and the full log", err)
	case denied:
		return fmt.Errorf("%w: all capabilities are there, so a security module, kernel lockdown or a seccomp profile forbids bpf(2)", err)
	case errors.Is(err, unix.ENOSYS), errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("%w: weft's programs need Linux 6.1 or newer with CONFIG_BPF_SYSCALL, CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS", err)
	}
	return err
}

func plural(one, many string, of []string) string {
	if len(of) == 1 {
		return one
	}
	return many
}

// The capabilities that programs and their attachment need, by number
// (linux/capability.h).
var neededCapabilities = []struct {
	name   string
	number uint
}{
	{"BPF", 39},       // load programs, make maps
	{"NET_ADMIN", 12}, // attach them to devices
	{"PERFMON", 38},   // pointer arithmetic the verifier otherwise forbids
}

// capSysAdmin stands for BPF and PERFMON, as it did before they existed.
const capSysAdmin = 21

// MissingCapabilities names the capabilities that this process lacks.
func MissingCapabilities() []string {
	have, err := effectiveCapabilities()
	if err != nil {
		return nil
	}
	var missing []string
	for _, c := range neededCapabilities {
		if have&(1<<c.number) == 0 && (c.number == 12 || have&(1<<capSysAdmin) == 0) {
			missing = append(missing, c.name)
		}
	}
	return missing
}

// effectiveCapabilities reads CapEff of proc_pid_status(5).
func effectiveCapabilities() (uint64, error) {
	f, err := os.Open("/proc/thread-self/status")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if hex, ok := strings.CutPrefix(lines.Text(), "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		}
	}
	return 0, errors.New("no CapEff in /proc/thread-self/status")
}

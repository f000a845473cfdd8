//go:build linux

package ebpf

import (
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/netns"
)

func TestMissingBPFFSIsMountedOnAHost(t *testing.T) {
	netns.RequireRoot(t)
	root := t.TempDir()
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	pins := filepath.Join(root, "weft")
	for range 2 { // and a second time nothing is left to do
		if err := ensureBPFFS(pins, root, ""); err != nil {
			t.Fatal(err)
		}
		if on, err := onBPFFS(pins); err != nil || !on {
			t.Errorf("on a bpffs: %v (%v)", on, err)
		}
	}
}

func TestMissingBPFFSIsNotMountedInAContainer(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "192.0.2.1")
	root := t.TempDir()
	err := ensureBPFFS(root, root, inContainer())
	if err == nil || !strings.Contains(err.Error(), "hostPath") {
		t.Errorf("the error is %v, want one that says what to mount", err)
	}
	if on, _ := onBPFFS(root); on {
		t.Error("a bpffs was mounted")
	}
}

func TestPinsOutsideTheUsualPlaceNeedABPFFSThere(t *testing.T) {
	err := ensureBPFFS(t.TempDir(), bpffsRoot, "")
	if err == nil || !strings.Contains(err.Error(), "mount -t bpf") {
		t.Errorf("the error is %v, want one that says what to mount", err)
	}
}

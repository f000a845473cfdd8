//go:build linux && amd64

package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestVerdict(t *testing.T) {
	const warning = "[   12.3] WARNING: CPU: 0 PID: 146 at net/core/dev.c:1 f+0x1/0x2\n"
	for _, tt := range []struct {
		situation string
		status    string // what came over the third line
		qemu      error
		console   string
		want      int
		says      string
	}{
		{"the command succeeded", "0\n", nil, "[ 1.1] mtrr: your CPUs differ\n", 0, ""},
		{"the command failed", "3\n", nil, warning, 3, ""},
		{"the kernel complained", "0\n", nil, warning, machineFailed, "net/core/dev.c"},
		{"a device was never released", "0\n", nil, "unregister_netdevice: waiting for lo to become free\n", machineFailed, "waiting for lo"},
		{"a slow machine looks stalled", "0\n", nil, "watchdog: BUG: soft lockup - CPU#1 stuck for 22s!\n", 0, ""},
		{"a panic before the end", "", nil, "Kernel panic - not syncing\n", machineFailed, "before its command ended"},
		{"no machine", "", errors.New("no memory"), "", machineFailed, "no memory"},
	} {
		t.Run(tt.situation, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "status")
			if err := os.WriteFile(file, []byte(tt.status), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := verdict(t.Context(), tt.qemu, file, []byte(tt.console))
			if got != tt.want {
				t.Errorf("status %d, want %d", got, tt.want)
			}
			if (err != nil) != (tt.says != "") || err != nil && !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %v, want %q", err, tt.says)
			}
		})
	}
}

func TestVerdictOutOfTime(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("not finished after 5m")
	cancel(why)
	if got, err := verdict(ctx, nil, "", nil); got != machineFailed || !errors.Is(err, why) {
		t.Errorf("got %d, %v, want %d, %v", got, err, machineFailed, why)
	}
}

func TestDecompress(t *testing.T) {
	const image = "\x7fELF and the rest of a kernel"
	dir := t.TempDir()
	from, to := filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "vmlinux")
	gzip := exec.Command("gzip", "-c")
	gzip.Stdin = strings.NewReader(image)
	payload, err := gzip.Output()
	if err != nil {
		t.Fatal(err)
	}
	// A magic number by accident, the payload, and what a bzImage has behind it.
	bz := "\x1f\x8b\x08 is no payload" + string(payload) + "\x00\x00\x00\x00"
	if err := os.WriteFile(from, []byte(bz), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := decompress(t.Context(), from, to); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(to); string(got) != image {
		t.Errorf("got %q, %v, want %q", got, err, image)
	}
}

func TestArchiveIsWhatTheKernelUnpacks(t *testing.T) {
	var a archive
	a.add("init", 0o100755, []byte("odd"))
	got := string(a.close())
	want := "070701" + "00000001" + "000081ed" + "00000000" + "00000000" + "00000001" + "00000000" + "00000003" +
		"00000000" + "00000000" + "00000000" + "00000000" + "00000005" + "00000000" + "init\x00\x00" + "odd\x00"
	if !strings.HasPrefix(got, want) {
		t.Errorf("got\n%q\nwant\n%q first", got, want)
	}
	if len(got)%4 != 0 || !strings.Contains(got, "TRAILER!!!") {
		t.Errorf("no aligned end: %q", got[len(want):])
	}
}

//go:build linux

package ebpf

import (
	"errors"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"

	"github.com/weft-net/weft/test/netns"
)

// The verifier takes all programs: with express, without it, and without it where
// the kernel does not tell its types.
func TestProgramsLoad(t *testing.T) {
	h := newHost(t)
	empty, err := btf.NewBuilder(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	none, err := empty.Spec()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		express bool
		types   *btf.Spec
	}{
		"with express": {express: true}, "without express": {}, "without types of the kernel": {types: none},
	} {
		t.Run(name, func(t *testing.T) {
			if c.express && MissingFunctions() != "" {
				t.Skip("this kernel has no express: " + MissingFunctions())
			}
			spec, err := loadWeft()
			if err != nil {
				t.Fatal(err)
			}
			if err := adjust(spec, Options{MaxPeers: 16, VNI: 1, Port: 8472, XDP: true}, c.express); err != nil {
				t.Fatal(err)
			}
			opts := ebpf.CollectionOptions{}
			opts.Programs.KernelTypes = c.types
			var objects weftObjects
			h.MustDo(t, func() error { return spec.LoadAndAssign(&objects, &opts) })
			objects.Close()
		})
	}
}

// Where the programs can't do express they do all else, and say why.
func TestNoExpress(t *testing.T) {
	h := newHost(t)
	a := newAccelerator(Options{PinDir: h.pins, MaxPeers: 16, VNI: 1, Port: 8472})
	h.MustDo(t, func() error {
		return errors.Join(EnsureBPFFS(h.pins), a.loadWith(false, btf.NewCache()), a.recoverSlots())
	})
	t.Cleanup(func() { a.Close() })
	h.sync(t, a)
	mustAllAttached(t, h.hooks(t), usualKind(t, h))

	b := h.open(t, 16)
	if missing := MissingFunctions(); b.NoExpress() != missing {
		t.Errorf("no express for %q, but missing is %q", b.NoExpress(), missing)
	}
}

// A kernel that does not take the program for the driver takes the others.
func TestNoXDP(t *testing.T) {
	h := newHost(t)
	a := newAccelerator(Options{PinDir: h.pins, MaxPeers: 16, VNI: 1, Port: 8472, XDP: true})
	a.spec = func() (*ebpf.CollectionSpec, error) {
		spec, err := loadWeft()
		if err == nil {
			spec.Programs[uplinkXDP].Instructions = asm.Instructions{asm.Return()} // of what?
		}
		return spec, err
	}
	h.MustDo(t, func() error { return errors.Join(EnsureBPFFS(h.pins), a.load(), a.recoverSlots()) })
	t.Cleanup(func() { a.Close() })
	h.sync(t, a)
	mustAllAttached(t, h.hooks(t), usualKind(t, h))
	if missing := MissingFunctions(); a.NoExpress() != missing {
		t.Errorf("no express for %q, but missing is %q", a.NoExpress(), missing)
	}
	if why := a.NoXDP(); !strings.Contains(why, "the kernel refuses the programs with XDP") || !strings.Contains(why, "uplink_xdp") {
		t.Errorf("in the way of XDP is %q", why)
	}
	if x, err := a.View().XDP(); err != nil || x.Attached {
		t.Errorf("a program is in the driver (%v)", err)
	}
}

func TestFunctionsAreLookedFor(t *testing.T) {
	netns.RequireRoot(t)
	cache := btf.NewCache()
	for name, want := range map[string]bool{
		"bpf_skb_ct_lookup": MissingFunctions() == "", "bpf_no_such_function": false, "": false,
	} {
		if got := hasFunction(cache, name); got != want {
			t.Errorf("%q is there: %v, want %v", name, got, want)
		}
	}
}

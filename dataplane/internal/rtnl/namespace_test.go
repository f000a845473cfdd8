//go:build linux

package rtnl

import (
	"errors"
	"os"
	"testing"

	"github.com/weft-net/weft/test/netns"
)

// here names the network namespace of the calling thread.
func here() (string, error) { return os.Readlink("/proc/thread-self/ns/net") }

func TestNamespaceIsEnteredFromAnother(t *testing.T) {
	ns := netns.New(t)
	var n *Namespace
	var want string
	ns.MustDo(t, func() (err error) {
		if n, err = OpenNamespace(); err == nil {
			want, err = here()
		}
		return err
	})
	outside, err := here()
	if err != nil || outside == want {
		t.Fatalf("the test itself is in %s: %v", outside, err)
	}
	for range 10 {
		var inside string
		err := n.Do(func() (err error) {
			inside, err = here()
			return err
		})
		if err != nil || inside != want {
			t.Errorf("inside it is %s, want %s: %v", inside, want, err)
		}
		// The thread that was moved serves nobody else.
		done := make(chan string)
		for range 10 {
			go func() {
				now, _ := here()
				done <- now
			}()
		}
		for range 10 {
			if now := <-done; now != outside {
				t.Fatalf("another goroutine is in %s, want %s", now, outside)
			}
		}
	}
	wrong := errors.New("wrong")
	if err := n.Do(func() error { return wrong }); !errors.Is(err, wrong) {
		t.Errorf("error is %v", err)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	err = n.Do(func() error {
		t.Error("a closed namespace was entered")
		return nil
	})
	if err == nil {
		t.Error("no error")
	}
}

// A container without CAP_SYS_ADMIN may use the namespace that it is in.
func TestOwnNamespaceIsNotEntered(t *testing.T) {
	n, err := OpenNamespace()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if changed, err := n.enter(); changed || err != nil {
		t.Errorf("entered: %v, error %v", changed, err)
	}
}

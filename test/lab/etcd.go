//go:build linux

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Etcd is a store that runs in the underlay, where every node reaches it.
type Etcd struct {
	// URL is where it listens.
	URL string

	lab     *Lab
	program string
	at      string // where it listens now
	process *Process
}

const (
	// etcdTimeout is how long it may take to listen.
	etcdTimeout = 20 * time.Second
	// etcdAside is where it listens while nobody shall reach it.
	etcdAside = "http://127.0.0.1:2379"
)

// StartEtcd starts a program etcd and waits until it answers. It keeps its data
// in the lab's directory.
func (l *Lab) StartEtcd(ctx context.Context, program string) (*Etcd, error) {
	e := &Etcd{URL: "http://" + net.JoinHostPort(l.Gateway().String(), "2379"), lab: l, program: program}
	return e, e.Start(ctx)
}

// Start starts it again, with the data that it had.
func (e *Etcd) Start(ctx context.Context) error { return e.startAt(ctx, e.URL) }

// startAt starts it to listen at a URL, and waits until it answers.
func (e *Etcd) startAt(ctx context.Context, url string) (err error) {
	const peerURL = "http://127.0.0.1:2380"
	e.at = url
	e.process, err = e.lab.Underlay.Start(e.program,
		"--data-dir", filepath.Join(e.lab.Directory(), "etcd"), "--log-level", "warn",
		"--listen-client-urls", url, "--advertise-client-urls", url,
		"--listen-peer-urls", peerURL, "--initial-advertise-peer-urls", peerURL, "--initial-cluster", "default="+peerURL,
		// Nothing has to outlive the lab, and nobody else is to be heard of.
		"--unsafe-no-fsync", "--heartbeat-interval", "1000", "--election-timeout", "5000")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, Patient(etcdTimeout), errors.New("no answer"))
	defer cancel()
	for {
		_, err := e.ask(ctx, "kv/range", map[string][]byte{"key": []byte("any")})
		if err == nil {
			return nil
		}
		if !e.process.Running() || sleep(ctx, 20*time.Millisecond) != nil {
			return fmt.Errorf("starting etcd: %w\n%s", err, e.process.Output())
		}
	}
}

// Stop ends it by a signal and waits until it is gone.
func (e *Etcd) Stop(sig syscall.Signal) error { return e.process.Stop(sig) }

// Aside runs f while etcd answers nobody else: those who watch it are cut off,
// and find what f has done when they reach it again.
func (e *Etcd) Aside(ctx context.Context, f func() error) error {
	// Told politely, it would wait for those who watch it.
	if err := e.Stop(unix.SIGKILL); err != nil {
		return err
	}
	if err := e.startAt(ctx, etcdAside); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	if err := e.Stop(unix.SIGKILL); err != nil {
		return err
	}
	return e.Start(ctx)
}

// Put writes keys and values.
func (e *Etcd) Put(ctx context.Context, pairs map[string]string) error {
	type put struct {
		Key   []byte `json:"key"`
		Value []byte `json:"value"`
	}
	type operation struct {
		Put put `json:"requestPut"`
	}
	var operations []operation
	for key, value := range pairs {
		operations = append(operations, operation{put{[]byte(key), []byte(value)}})
	}
	const most = 100 // operations in a transaction: etcd takes 128
	for some := range slices.Chunk(operations, most) {
		if _, err := e.ask(ctx, "kv/txn", map[string]any{"success": some}); err != nil {
			return fmt.Errorf("writing to etcd: %w", err)
		}
	}
	return nil
}

// Get returns the keys that begin with a prefix, and their values.
func (e *Etcd) Get(ctx context.Context, prefix string) (map[string]string, error) {
	text, err := e.ask(ctx, "kv/range", map[string][]byte{"key": []byte(prefix), "range_end": rangeEnd(prefix)})
	if err != nil {
		return nil, fmt.Errorf("reading %s from etcd: %w", prefix, err)
	}
	var answer struct {
		Pairs []struct{ Key, Value []byte } `json:"kvs"`
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return nil, fmt.Errorf("reading %s from etcd: %w\n%s", prefix, err, text)
	}
	found := map[string]string{}
	for _, pair := range answer.Pairs {
		found[string(pair.Key)] = string(pair.Value)
	}
	return found, nil
}

// Delete deletes the keys that begin with a prefix.
func (e *Etcd) Delete(ctx context.Context, prefix string) error {
	_, err := e.ask(ctx, "kv/deleterange", map[string][]byte{"key": []byte(prefix), "range_end": rangeEnd(prefix)})
	if err != nil {
		return fmt.Errorf("deleting %s in etcd: %w", prefix, err)
	}
	return nil
}

// rangeEnd is the key behind all that begin with a prefix. Flannel's end in no
// byte that can't be counted up.
func rangeEnd(prefix string) []byte {
	end := []byte(prefix)
	end[len(end)-1]++
	return end
}

// Compact makes etcd forget all that has been changed since.
func (e *Etcd) Compact(ctx context.Context) error {
	text, err := e.ask(ctx, "kv/range", map[string][]byte{"key": []byte("any")})
	if err != nil {
		return err
	}
	var answer struct {
		Header struct{ Revision string } // of 64 bits, and so a string in JSON
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return fmt.Errorf("asking etcd for its revision: %w\n%s", err, text)
	}
	if _, err := strconv.ParseInt(answer.Header.Revision, 10, 64); err != nil {
		return fmt.Errorf("asking etcd for its revision: %w\n%s", err, text)
	}
	_, err = e.ask(ctx, "kv/compaction", map[string]any{"revision": answer.Header.Revision, "physical": true})
	return err
}

// ask calls etcd's API in its JSON form, in which bytes are base64.
func (e *Etcd) ask(ctx context.Context, method string, question any) ([]byte, error) {
	text, err := json.Marshal(question)
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, e.at+"/v3/"+method, bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	response, err := e.lab.Underlay.HTTP().Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", method, response.Status, body)
	}
	return body, err
}

// Command pod is what containers of the cluster run: with no argument it sleeps, as
// a pod's first container does; `pod serve` answers, and asks on behalf of a test. Told
// to end, `pod serve 5s` answers for that much longer, until nobody asks any more.
//
//	TCP 8080  HTTP: /who, /fetch, /resolve, /udp, /stream, /start and /stop of a load
//	UDP 8081  echo
//	TCP 8082  echo
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/weft-net/weft/test/cluster/load"
)

func main() {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	if len(os.Args) > 1 && os.Args[1] == "serve" {
		go func() { fatal(serve()) }()
	}
	<-ended
	if len(os.Args) > 2 {
		linger, err := time.ParseDuration(os.Args[2])
		if err != nil {
			fatal(err)
		}
		time.Sleep(linger)
	}
}

// timeout is for one question that a test asks.
const timeout = 3 * time.Second

func serve() error {
	datagrams, err := net.ListenPacket("udp", ":8081")
	if err != nil {
		return err
	}
	connections, err := net.Listen("tcp", ":8082")
	if err != nil {
		return err
	}
	go echoDatagrams(datagrams)
	go echoConnections(connections)
	http.HandleFunc("/who", who)
	http.HandleFunc("/fetch", asked(fetch))
	http.HandleFunc("/resolve", asked(resolve))
	http.HandleFunc("/udp", asked(askUDP))
	http.HandleFunc("/stream", asked(stream))
	http.HandleFunc("/start", startLoad)
	http.HandleFunc("/stop", stopLoad)
	return http.ListenAndServe(":8080", nil)
}

func echoDatagrams(conn net.PacketConn) {
	buffer := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFrom(buffer)
		if err != nil {
			fatal(err)
		}
		_, _ = conn.WriteTo(buffer[:n], from) // who has not got it asks again
	}
}

func echoConnections(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			fatal(err)
		}
		go func() {
			defer conn.Close()
			_, _ = io.Copy(conn, conn) // the other side finds out
		}()
	}
}

// who says the pod's name, and the address that the client was seen with.
func who(w http.ResponseWriter, r *http.Request) {
	name, err := os.Hostname()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	host, _, _ := net.SplitHostPort(r.RemoteAddr)
	fmt.Fprintf(w, "%s %s", name, host)
}

// asked is a page that does something from within the pod: to=HOST:PORT says with
// whom, count=N how much.
func asked(do func(to string, count int) (string, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		count, err := strconv.Atoi(r.FormValue("count"))
		if err != nil && r.FormValue("count") != "" {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		said, err := do(r.FormValue("to"), count)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		fmt.Fprint(w, said)
	}
}

// running is the load that the pod makes, if any.
var running struct {
	sync.Mutex
	load *load.Load
}

// startLoad starts one: stream=, http= and udp= say whom to ask.
func startLoad(w http.ResponseWriter, r *http.Request) {
	running.Lock()
	defer running.Unlock()
	if err := r.ParseForm(); err != nil || running.load != nil {
		http.Error(w, "a load runs already, or the question can't be read", http.StatusConflict)
		return
	}
	running.load = load.Start(load.Targets{Stream: r.Form["stream"], HTTP: r.Form["http"], UDP: r.Form["udp"]})
}

// stopLoad ends the load and says what it has seen.
func stopLoad(w http.ResponseWriter, _ *http.Request) {
	running.Lock()
	defer running.Unlock()
	if running.load == nil {
		http.Error(w, "no load runs", http.StatusConflict)
		return
	}
	report := running.load.Stop()
	running.load = nil
	if err := json.NewEncoder(w).Encode(report); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}

// fetch gets the page /who by a new connection.
func fetch(to string, _ int) (string, error) {
	client := http.Client{Timeout: timeout, Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Get("http://" + to + "/who")
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	return string(text), err
}

// resolve asks the pod's name server for the addresses of a name.
func resolve(name string, _ int) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	addresses, err := net.DefaultResolver.LookupHost(ctx, name)
	return strings.Join(addresses, " "), err
}

// askUDP sends a datagram of count bytes, which must come back. The first of a size
// may only teach the sender the path's MTU.
func askUDP(to string, count int) (string, error) {
	conn, err := net.Dial("udp", to)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	question, answer := bytes.Repeat([]byte("w"), count), make([]byte, 1<<16)
	for range 3 {
		if _, err = conn.Write(question); err != nil {
			continue
		}
		if err := conn.SetReadDeadline(time.Now().Add(timeout / 3)); err != nil {
			return "", err
		}
		var n int
		if n, err = conn.Read(answer); err == nil && bytes.Equal(answer[:n], question) {
			return "ok", nil
		}
	}
	return "", errors.Join(err, errors.New("no answer that is right"))
}

// stream sends count small messages on one connection, each after the answer to the
// one before, and some milliseconds apart.
func stream(to string, count int) (string, error) {
	conn, err := net.DialTimeout("tcp", to, timeout)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	message := []byte("weft")
	for i := range count {
		if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
			return "", err
		}
		if _, err := conn.Write(message); err != nil {
			return "", fmt.Errorf("message %d: %w", i, err)
		}
		if _, err := io.ReadFull(conn, message); err != nil {
			return "", fmt.Errorf("answer %d: %w", i, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
	return "ok", nil
}

// fatal ends the program with a message.
func fatal(a ...any) {
	fmt.Fprintln(os.Stderr, a...)
	os.Exit(1)
}

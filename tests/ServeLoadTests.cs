using System.Globalization;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Text.Json.Nodes;
using MiniCpmNative.Cli.Serve;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// 64 clients at once, some of them broken, slow or gone in the middle. CPMX_LOAD_SECONDS is how
/// long, in place of a few seconds.
/// </summary>
[TestFixture]
public sealed class ServeLoadTests
{
    private const int Clients = 64;

    private static readonly int s_seconds = int.Parse(
        Environment.GetEnvironmentVariable("CPMX_LOAD_SECONDS") ?? "6",
        CultureInfo.InvariantCulture);

    [Test]
    public async Task NoAnswerIsMixedUpAndNothingIsLeft()
    {
        await using ServedModel served =
            await ServedModel.Start(new ServeOptions { Port = 0, MostWaiting = 2 * Clients });
        var uri = new Uri(served.Server.Address + ServedModel.Completions);
        using var http = new HttpClient { Timeout = TimeSpan.FromMinutes(5) };
        JsonObject[] bodies = [.. Enumerable.Range(0, 16).Select(Body)];
        string[] alone = new string[bodies.Length];
        for (int i = 0; i < bodies.Length; i++) alone[i] = await Ask(http, uri, bodies[i]);
        int[] counts = new int[4];
        long before = GC.GetTotalMemory(forceFullCollection: true);
        DateTime end = DateTime.UtcNow.AddSeconds(s_seconds);
        await Task.WhenAll(Enumerable.Range(0, Clients).Select(async client =>
        {
            await Task.Yield();
            var random = new Random(client);
            while (DateTime.UtcNow < end)
            {
                int kind = random.Next(8), which = random.Next(bodies.Length);
                if (kind < 5)
                {
                    string answer = await Ask(http, uri, bodies[which]);
                    Assert.That(answer, Is.EqualTo(alone[which]), $"client {client}");
                }
                else if (kind == 5) await Broken(http, uri, bodies[which], random);
                else await Leaves(uri, bodies[which], random, slow: kind == 6);
                Interlocked.Increment(ref counts[Math.Max(0, kind - 4)]);
            }
        }));
        // Whoever left is out of the way, and the memory of all of them too.
        Assert.That(await Ask(http, uri, bodies[0]), Is.EqualTo(alone[0]));
        long grown = GC.GetTotalMemory(forceFullCollection: true) - before;
        TestContext.Progress.WriteLine($"{s_seconds} s: {counts[0]} answers, {counts[1]} broken, "
            + $"{counts[2]} slow, {counts[3]} gone; {grown:N0} bytes more");
        Assert.That(counts, Has.All.GreaterThan(0));
        Assert.That(grown, Is.LessThan(32 << 20));
    }

    private static JsonObject Body(int i) => new()
    {
        ["messages"] = new JsonArray(new JsonObject
        {
            ["role"] = "user",
            ["content"] = $"How many is {i} and {i * 7 % 5}?",
        }),
        ["model"] = i % 3 == 0 ? "tiny:base" : "tiny",
        ["max_tokens"] = 3 + (i % 6),
        ["temperature"] = 0,
    };

    private static async Task<string> Ask(HttpClient http, Uri uri, JsonObject body)
    {
        using HttpResponseMessage reply = await http.PostAsync(uri, new StringContent(
            body.ToJsonString(), Encoding.UTF8, "application/json"));
        string text = await reply.Content.ReadAsStringAsync();
        Assert.That(reply.StatusCode, Is.EqualTo(HttpStatusCode.OK), text);
        return JsonNode.Parse(text)!["choices"]![0]!["message"]!["content"]!.GetValue<string>();
    }

    // Answered with an error in JSON, or, where what was damaged means nothing, as ever.
    private static async Task Broken(HttpClient http, Uri uri, JsonObject body, Random random)
    {
        byte[] bytes = Encoding.UTF8.GetBytes(body.ToJsonString());
        for (int k = random.Next(1, 4); k > 0; k--)
            bytes[random.Next(bytes.Length)] = (byte)random.Next(256);
        using var content = new ByteArrayContent(bytes);
        content.Headers.ContentType = new("application/json");
        using HttpResponseMessage reply = await http.PostAsync(uri, content);
        string text = await reply.Content.ReadAsStringAsync();
        Assert.That(reply.StatusCode, Is.AnyOf(HttpStatusCode.OK, HttpStatusCode.BadRequest), text);
        if (reply.StatusCode == HttpStatusCode.BadRequest)
            Assert.That(JsonNode.Parse(text)!["error"]!["message"]!.GetValue<string>(),
                Is.Not.Empty);
    }

    // Goes after some bytes of the request or of the answer; slowly where asked.
    private static async Task Leaves(Uri uri, JsonObject body, Random random, bool slow)
    {
        body = body.DeepClone().AsObject();
        body["stream"] = true;
        body["max_tokens"] = 500;
        string json = body.ToJsonString();
        byte[] bytes = Encoding.UTF8.GetBytes($"POST {uri.AbsolutePath} HTTP/1.1\r\n"
            + $"Host: {uri.Authority}\r\nContent-Type: application/json\r\n"
            + $"Content-Length: {Encoding.UTF8.GetByteCount(json)}\r\n\r\n{json}");
        using var client = new TcpClient();
        await client.ConnectAsync(IPAddress.Loopback, uri.Port);
        NetworkStream stream = client.GetStream();
        if (slow)
        {
            for (int at = 0; at < bytes.Length; at += 40)
            {
                await stream.WriteAsync(bytes.AsMemory(at, Math.Min(40, bytes.Length - at)));
                await Task.Delay(5);
            }
        }
        else await stream.WriteAsync(bytes.AsMemory(0, random.Next(2) == 0
            ? bytes.Length : random.Next(bytes.Length)));

        if (slow || random.Next(2) == 0)
        {
            using var patience = new CancellationTokenSource(200);
            try
            {
                await stream.ReadAtLeastAsync(new byte[64], 1, false, patience.Token);
            }
            catch (OperationCanceledException)
            {
            }
        }

        client.LingerState = new LingerOption(true, 0); // reset, not closed
    }
}

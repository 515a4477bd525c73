using System.Net;
using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Cli.Serve;
using MiniCpmNative.Engine.Generate;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>cpmx serve, by requests over a socket.</summary>
[TestFixture]
public sealed class ServeTests
{
    private const string Completions = ServedModel.Completions;

    private readonly HttpClient _client = new();
    private ServedModel _served = null!;

    private ChatServer Server => _served.Server;

    [OneTimeSetUp]
    public async Task Serve() => _served = await ServedModel.Start(new ServeOptions { Port = 0 });

    [OneTimeTearDown]
    public async Task End()
    {
        await _served.DisposeAsync();
        _client.Dispose();
    }

    // What the official chat() answers: reference/generation.
    [Test]
    public async Task AnswersAreThoseOfTheOfficialChat([Values] bool stream)
    {
        JsonObject body = Question("What is in the picture?", 8);
        body["messages"]![0]!["content"] = new JsonArray(
            Picture("p0.png"), Part("What is in the picture?"));
        body["model"] = "tiny:base";
        body["stream"] = stream;
        Assert.That(await Text(body), Is.EqualTo("signhohohohohohoho"));
    }

    [Test]
    public async Task TheAdapterIsAnotherModelOfTheServer()
    {
        using JsonDocument models =
            JsonDocument.Parse(await _client.GetStringAsync(Server.Address + "/v1/models"));
        Assert.That(models.RootElement.GetProperty("data").EnumerateArray()
            .Select(model => model.GetProperty("id").GetString()),
            Is.EqualTo((string[])["tiny", "tiny:base"]));
        JsonObject body = Question("", 8);
        body["messages"]![0]!["content"] = new JsonArray(
            Picture("p0.png"), Part("What is in the picture?"));
        string adapted = await Text(body);
        body["model"] = "tiny";
        Assert.That(await Text(body), Is.EqualTo(adapted));
        body["model"] = "tiny:base";
        Assert.That(await Text(body), Is.Not.EqualTo(adapted));
    }

    [Test]
    public async Task NumbersOfTokensAreTold()
    {
        JsonObject body = Question("Name a colour.", 5);
        using JsonDocument whole = JsonDocument.Parse(await Send(body, HttpStatusCode.OK));
        JsonElement usage = whole.RootElement.GetProperty("usage");
        Assert.That(usage.GetProperty("completion_tokens").GetInt32(), Is.EqualTo(5));
        Assert.That(usage.GetProperty("total_tokens").GetInt32(),
            Is.EqualTo(usage.GetProperty("prompt_tokens").GetInt32() + 5));
        Assert.That(whole.RootElement.GetProperty("choices")[0].GetProperty("finish_reason")
            .GetString(), Is.EqualTo("length"));
        body["stream"] = true;
        body["stream_options"] = new JsonObject { ["include_usage"] = true };
        string[] events = Events(await Send(body, HttpStatusCode.OK));
        Assert.That(events[^1], Is.EqualTo("[DONE]"));
        using JsonDocument last = JsonDocument.Parse(events[^2]);
        Assert.That(last.RootElement.GetProperty("usage").GetRawText(),
            Is.EqualTo(usage.GetRawText()));
    }

    // Wherever it is cut, a stop text and what is behind it are not told.
    [Test]
    public async Task AnAnswerEndsBeforeAStopText([Values] bool stream)
    {
        JsonObject body = Question("Name a colour.", 12);
        string text = await Text(body);
        body["stream"] = stream;
        for (int from = 1; from + 3 <= text.Length; from++)
        {
            string stop = text[from..(from + 3)];
            body["stop"] = new JsonArray("never said", stop);
            Assert.That(await Text(body), Is.EqualTo(text[..text.IndexOf(
                stop, StringComparison.Ordinal)].TrimEnd()), stop);
        }
    }

    [Test]
    public async Task ASeedDecidesWhatIsDrawn()
    {
        JsonObject body = Question("Name a colour.", 12);
        body["temperature"] = 1.5;
        body["top_k"] = 0;
        var texts = new HashSet<string>();
        for (int seed = 0; seed < 4; seed++)
        {
            body["seed"] = seed;
            string text = await Text(body);
            Assert.That(await Text(body), Is.EqualTo(text));
            texts.Add(text);
        }

        Assert.That(texts, Has.Count.EqualTo(4));
    }

    // Each gets what it gets alone, whoever is answered with it.
    [Test]
    public async Task ManyAtOnceAreNotMixedUp()
    {
        JsonObject[] bodies = [.. Enumerable.Range(0, 32).Select(i =>
        {
            JsonObject body = Question($"How many is {i} and {i * 7 % 5}?", 3 + (i % 6));
            body["stream"] = i % 2 == 0;
            if (i % 3 == 0) body["model"] = "tiny:base";
            return body;
        })];
        var alone = new string[bodies.Length];
        for (int i = 0; i < bodies.Length; i++) alone[i] = await Text(bodies[i]);
        Assert.That(alone.Distinct().Count(), Is.GreaterThan(10));
        Assert.That(await Task.WhenAll(bodies.Select(Text)), Is.EqualTo(alone));
    }

    [TestCase("", "is empty")]
    [TestCase("[]", "expected an object")]
    [TestCase("{\"messages\": 1}", "expected an array")]
    [TestCase("{\"model\": \"tiny\"}", "\"messages\" is missing")]
    [TestCase("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": [{\"type\": "
        + "\"function\", \"function\": {\"name\": \"f\"}}]}",
        "the request: has functions (tools, tool_calls or turns of role tool), which the chat "
        + "template of this model (MiniCPM-V-2_6) does not have")]
    [TestCase("{\"messages\": []}", "ends without a question")]
    [TestCase("""{"messages": [{"role": "user", "content": "a"}], "model": "gpt"}""",
        "there is no model \"gpt\", expected tiny or tiny:base")]
    [TestCase("""{"messages": [{"role": "assistant", "content": "a"}]}""", "user and assistant")]
    [TestCase("""{"messages": [{"role": "user", "content": []}]}""", "is empty")]
    [TestCase("""{"messages": [{"role": "user", "content": "a"}], "temperature": -1}""",
        "temperature")]
    [TestCase("""{"messages": [{"role": "user", "content": "a"}], "tools": [1]}""", "tools")]
    [TestCase("""{"messages": [{"role": "user", "content": "a"}], "n": 2}""", "expected 1")]
    [TestCase("""{"messages": [{"role": "user", "content": "a"}], "best": 2}""", "not known")]
    [TestCase("""{"messages": [{"role": "user", "content": "</image>"}]}""",
        "image tokens as text")]
    [TestCase("""{"messages": [{"role": "user", "content": "<image><unk><unk></image>"}]}""",
        "image tokens as text")]
    [TestCase("""
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url":
        {"url": "http://example.com/a.png"}}]}]}
        """, "nothing is fetched")]
    [TestCase("""
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio":
        {"data": "AAAA", "format": "wav"}}]}]}
        """, "sound 1: the model does not hear as it is run")]
    [TestCase("""
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url":
        {"url": "data:image/png;base64,AAAA"}}]}]}
        """, "picture 1: is no picture")]
    public async Task WhatIsWrongIsSaid(string body, string expected)
    {
        using HttpResponseMessage reply = await _client.PostAsync(Server.Address + Completions,
            new StringContent(body, Encoding.UTF8, "application/json"));
        Assert.That(reply.StatusCode, Is.EqualTo(HttpStatusCode.BadRequest));
        using JsonDocument json = JsonDocument.Parse(await reply.Content.ReadAsStringAsync());
        Assert.That(json.RootElement.GetProperty("error").GetProperty("message").GetString(),
            Does.Contain(expected));
    }

    // Refused in words, or understood; nothing else.
    [Test]
    public async Task DamagedRequestsAreRefused()
    {
        JsonObject body = Question("Name a colour.", 3);
        body["messages"]![0]!["content"] = new JsonArray(Picture("p0.png"), new JsonObject
        {
            ["type"] = "video_url",
            ["video_url"] = new JsonObject
            {
                ["url"] = new JsonArray("data:image/png;base64,AAAA", "data:image/png;base64,BBBB"),
                ["fps"] = 2,
            },
        }, Part("What?"));
        body["stop"] = new JsonArray("x", "yy");
        body["stream_options"] = new JsonObject { ["include_usage"] = true };
        body["messages"]!.AsArray().Add(JsonNode.Parse("""
            {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function":
            {"name": "f", "arguments": "{\"a\": [1]}"}}]}
            """));
        body["messages"]!.AsArray().Add(JsonNode.Parse(
            """{"role": "tool", "tool_call_id": "a", "content": "r"}"""));
        body["tools"] = JsonNode.Parse("""
            [{"type": "function", "function": {"name": "f", "description": "d", "parameters":
            {"type": "object", "properties": {"a": {"type": "array"}}}}}]
            """);
        body["tool_choice"] = JsonNode.Parse(
            """{"type": "function", "function": {"name": "f"}}""");
        string text = body.ToJsonString();
        byte[] whole = Encoding.UTF8.GetBytes(text);
        Assert.That(ChatRequest.Read(whole, new GenerationSettings()).MustCall, Is.EqualTo("f"));
        var random = new Random(1);
        int refused = 0, sent = 0;
        for (int i = 0; i < 10_000; i++)
        {
            byte[] bytes = i % 2 == 0 ? Damaged(whole, random) : Twisted(text, random);
            try
            {
                ChatRequest.Read(bytes, new GenerationSettings());
                continue;
            }
            catch (Engine.InputException)
            {
                refused++;
            }

            // Some of them by way of the server, which is there for others all the while.
            if (refused % 20 > 0) continue;
            sent++;
            using var content = new ByteArrayContent(bytes);
            content.Headers.ContentType = new("application/json");
            using HttpResponseMessage reply =
                await _client.PostAsync(Server.Address + Completions, content);
            string answer = await reply.Content.ReadAsStringAsync();
            Assert.That(reply.StatusCode, Is.EqualTo(HttpStatusCode.BadRequest), answer);
            Assert.That(JsonNode.Parse(answer)!["error"]!["message"]!.GetValue<string>(),
                Is.Not.Empty.And.Not.Contain("\n"));
        }

        TestContext.Out.WriteLine($"{refused} refused, {sent} of them by the server");
        Assert.That(refused, Is.GreaterThan(3000));
        Assert.That(sent, Is.GreaterThan(150));
        Assert.That(await Text(Question("Name a colour.", 3)), Is.Not.Empty);
    }

    // Bytes that are others, or an end too early.
    private static byte[] Damaged(byte[] whole, Random random)
    {
        byte[] bytes = [.. whole];
        for (int k = random.Next(1, 4); k > 0; k--)
        {
            // The picture is long: most places are beside it.
            int at = random.Next(2) == 0 ? random.Next(bytes.Length) : random.Next(90);
            bytes[at] = (byte)random.Next(256);
        }

        return random.Next(4) == 0 ? bytes[..random.Next(bytes.Length)] : bytes;
    }

    private static readonly string[] s_values =
    [
        "null", "true", "-1", "0", "1e999", "-1e308", "9223372036854775808", "0.1", "[]", "{}",
        "\"\"", "\"\\ud800\"", "\"\\u0000\"", "\"data:;base64,\"", "\"data:image/png;base64,AAAA\"",
        new string('[', 2000) + new string(']', 2000), "[[[]]]", "{\"role\": \"user\"}",
        "\"" + new string('x', 20000) + "\"", "{\"a\": 1, \"a\": 2}",
    ];

    // A value in place of another, anywhere, or a member twice.
    private static byte[] Twisted(string text, Random random)
    {
        string value = s_values[random.Next(s_values.Length)];
        int[] starts = [.. Enumerable.Range(0, text.Length - 1).Where(i => text[i] == ':'
            && text[i - 1] == '"')];
        int at = starts[random.Next(starts.Length)] + 1, end = at, depth = 0;
        bool quoted = false;
        for (; end < text.Length; end++)
        {
            if (text[end] == '"') quoted = !quoted;
            if (quoted) continue;
            if (text[end] is '{' or '[') depth++;
            else if (text[end] is '}' or ']' && --depth < 0) break;
            else if (text[end] == ',' && depth == 0) break;
        }

        string changed = random.Next(5) > 0 ? text[..at] + value + text[end..]
            : text[..^1] + ", \"" + (random.Next(2) > 0 ? "seed" : "messages") + "\": " + value
                + "}";
        return Encoding.UTF8.GetBytes(changed);
    }

    [Test]
    public async Task OtherSitesDoNotReachIt()
    {
        using var request = new HttpRequestMessage(HttpMethod.Get, Server.Address + "/v1/models");
        request.Headers.Host = "rebound.example";
        using HttpResponseMessage reply = await _client.SendAsync(request);
        Assert.That(reply.StatusCode, Is.EqualTo(HttpStatusCode.Forbidden));
        using HttpResponseMessage form = await _client.PostAsync(
            Server.Address + Completions, new StringContent("{}", Encoding.UTF8, "text/plain"));
        Assert.That(form.StatusCode, Is.EqualTo(HttpStatusCode.BadRequest));
    }

    [Test]
    public async Task AKeyTooLargeABodyAndTooManyRequestsAreAnswered()
    {
        await using ServedModel served = await ServedModel.Start(
            new ServeOptions { Port = 0, Key = "secret", MostBytes = 500, MostWaiting = 1 });
        JsonObject body = Question("Name a colour.", 2);
        Assert.That(await Status("wrong", body), Is.EqualTo(HttpStatusCode.Unauthorized));
        Assert.That(await Status("secret", body), Is.EqualTo(HttpStatusCode.OK));
        body["user"] = new string('x', 600);
        Assert.That(await Status("secret", body),
            Is.EqualTo(HttpStatusCode.RequestEntityTooLarge));
        JsonObject endless = Question("Name a colour.", 300);
        endless["temperature"] = 2;
        HttpStatusCode[] all = await Task.WhenAll(
            Enumerable.Range(0, 12).Select(_ => Status("secret", endless)));
        Assert.That(all.Distinct(), Is.EquivalentTo(
            (HttpStatusCode[])[HttpStatusCode.OK, HttpStatusCode.TooManyRequests]));

        async Task<HttpStatusCode> Status(string key, JsonObject body)
        {
            using var request = new HttpRequestMessage(
                HttpMethod.Post, served.Server.Address + Completions)
            { Content = Json(body) };
            request.Headers.Authorization = new("Bearer", key);
            using HttpResponseMessage reply = await _client.SendAsync(request);
            return reply.StatusCode;
        }
    }

    private static JsonObject Question(string text, int tokens) => new()
    {
        ["messages"] = new JsonArray(new JsonObject { ["role"] = "user", ["content"] = text }),
        ["max_tokens"] = tokens,
        ["temperature"] = 0,
    };

    private static JsonObject Part(string text) => new() { ["type"] = "text", ["text"] = text };

    private static JsonObject Picture(string name) => new()
    {
        ["type"] = "image_url",
        ["image_url"] = new JsonObject
        {
            ["url"] = "data:image/png;base64," + Convert.ToBase64String(File.ReadAllBytes(
                Path.Combine(ReferenceFile.Root, "v26", "data", "images", name))),
        },
    };

    private static StringContent Json(JsonObject body) =>
        new(body.ToJsonString(), Encoding.UTF8, "application/json");

    private async Task<string> Send(JsonObject body, HttpStatusCode expected)
    {
        using HttpResponseMessage reply =
            await _client.PostAsync(Server.Address + Completions, Json(body));
        string text = await reply.Content.ReadAsStringAsync();
        Assert.That(reply.StatusCode, Is.EqualTo(expected), text);
        return text;
    }

    private async Task<string> Text(JsonObject body)
    {
        string reply = await Send(body, HttpStatusCode.OK);
        if (body["stream"]?.GetValue<bool>() != true)
            return JsonNode.Parse(reply)!["choices"]![0]!["message"]!["content"]!
                .GetValue<string>();
        return string.Concat(Events(reply).SkipLast(1).Select(line =>
            JsonNode.Parse(line)!["choices"]![0]!["delta"]!["content"]?.GetValue<string>()));
    }

    private static string[] Events(string stream) =>
        [.. stream.Split("\n\n", StringSplitOptions.RemoveEmptyEntries)
            .Select(line => line["data: ".Length..])];
}
